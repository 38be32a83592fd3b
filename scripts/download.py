"""Download the published index, corpus, data and checkpoint: `python scripts/download.py --save_path DIR --help`."""

from verl.retrieval.download import main

if __name__ == "__main__":
    main()
