"""One error type per boundary. Every message says what came, what was expected and what to do."""


class SearchAgentError(Exception):
    """Base of all errors that this project raises on purpose."""


class ConfigError(SearchAgentError):
    """A configuration value or key is wrong; raised before any process starts."""


class DataError(SearchAgentError):
    """A corpus line, parquet row or result file is malformed."""


class RetrieverError(SearchAgentError):
    """The retriever could not answer within its retries, or answered something else than its contract."""


class GeneratorError(SearchAgentError):
    """The frozen generator or judge could not answer within its retries."""


class GrammarError(SearchAgentError):
    """A grammar was configured or used wrongly (never raised for text that a policy wrote)."""


class EngineError(SearchAgentError):
    """The rollout engine could not generate, for example because a prompt exceeds the model's context."""


class CheckpointError(SearchAgentError):
    """A checkpoint is missing, incomplete or belongs to another model."""


class ServiceError(SearchAgentError):
    """A service process could not be started, did not become healthy in time, or ended while it was needed."""


class WorkerError(SearchAgentError):
    """A worker process raised, died or could not be placed; the message carries the worker's own traceback."""
