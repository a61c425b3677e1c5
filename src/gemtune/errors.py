"""Faults that a user can mend: they are shown as one message, without a traceback."""


class UserError(Exception):
    """What is wrong, what was received, what is allowed, and the remedy."""


class ConfigError(UserError):
    """A key, a value or a combination of them that no run can be made from."""


class ModelError(UserError):
    """A checkpoint that cannot be read, or is not a Gemma 4."""


class DataError(UserError):
    """A source, a row or a media file that cannot be learned from."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or continued from."""


class PatchError(UserError):
    """A patch that does not fit the model, or conflicts with another one."""


class TrainingError(UserError):
    """A run that cannot go on, for example because its loss is not finite."""


class ReportError(UserError):
    """A folder that no report can be made of, or a place that it cannot be written to."""
