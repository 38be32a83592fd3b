"""Search engines of others, which DeepRetrieval's policies write queries for."""
