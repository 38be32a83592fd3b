"""Figures that the papers report, in percent, for the settings in which ours can be put beside them.

`general`: mean accuracy (GenAcc) over NQ, TriviaQA, PopQA, HotpotQA, 2WikiMultiHopQA and MuSiQue; `medical`: over the
five MIRAGE sets; both of the s3 repository's README and figure (bars read by eye, 0.3 points), with Claude-3-Haiku as
generator and judge. `exsearch`: mean EM over NQ, HotpotQA, MuSiQue and 2WikiMultiHopQA, of the ExSearch repository's
table, for policies that answer themselves: `exsearch` and `search_r1` are Qwen2.5-7B, `search_o1` is QwQ-32B,
`zero_shot` GPT-4o. `pubmed` and `ctgov`: recall@3000 of the DeepRetrieval README; `_no_reason` is without thinking.
"""

from __future__ import annotations

PAPER: dict[str, dict[str, float]] = {
    "general": {
        "zero_shot": 38.9,
        "cot": 50.3,
        "rag_bm25": 44.1,
        "naive_rag": 51.1,
        "deepretrieval": 51.9,
        "ircot": 54.0,
        "search_o1": 53.3,
        "search_r1": 57.8,
        "s3_8_3_3": 58.9,
    },
    "medical": {
        "zero_shot": 65.3,
        "cot": 66.7,
        "rag_bm25": 74.5,
        "naive_rag": 74.6,
        "deepretrieval": 75.8,
        "ircot": 73.8,
        "search_o1": 73.5,
        "search_r1": 71.8,
        "s3_8_3_3": 76.6,
    },
    "exsearch": {
        "exsearch": 43.02,
        "exsearch_qwen2.5_3b": 32.50,
        "exsearch_llama3.1_8b": 39.94,
        "exsearch_llama3.2_3b": 28.63,
        "exsearch_mistral_7b": 41.58,
        "exsearch_mistral_24b": 44.75,
        "search_r1": 39.89,
        "search_o1": 33.79,
        "zero_shot": 32.90,
    },
    "pubmed": {
        "raw_query": 10.36,
        "gpt_3_5": 11.67,
        "gpt_3_5_no_reason": 18.68,
        "gpt_4o": 17.59,
        "gpt_4o_no_reason": 19.72,
        "claude_3_haiku": 11.26,
        "claude_3_haiku_no_reason": 20.92,
        "claude_3_5_sonnet": 20.94,
        "claude_3_5_sonnet_no_reason": 19.08,
        "mistral_7b": 7.18,
        "leads_7b": 24.68,
        "qwen2_5_3b": 6.59,
        "qwen2_5_3b_no_reason": 9.46,
        "deepretrieval": 65.07,
        "deepretrieval_no_reason": 51.90,
    },
    "ctgov": {
        "raw_query": 18.01,
        "gpt_3_5": 9.42,
        "gpt_3_5_no_reason": 13.94,
        "gpt_4o": 16.25,
        "gpt_4o_no_reason": 14.26,
        "claude_3_haiku": 10.10,
        "claude_3_haiku_no_reason": 24.68,
        "claude_3_5_sonnet": 18.33,
        "claude_3_5_sonnet_no_reason": 18.41,
        "mistral_7b": 8.08,
        "leads_7b": 32.11,
        "qwen2_5_3b": 6.09,
        "qwen2_5_3b_no_reason": 7.97,
        "deepretrieval": 63.18,
        "deepretrieval_no_reason": 53.31,
    },
}
METRIC = {
    "general": "macro_accuracy",
    "medical": "macro_accuracy",
    "exsearch": "own_em",
    "pubmed": "recall",
    "ctgov": "recall",
}
"""Which of our figures each setting's numbers stand beside."""
