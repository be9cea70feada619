"""Every exception that Outrider raises on purpose, in one tree.

A message is one readable line that names the offending value. Errors about what a
caller passed are also ``ValueError``, so generic handlers keep working.
"""


class OutriderError(Exception):
    """Base of all of Outrider's own errors."""


class InvalidRequestError(OutriderError, ValueError):
    """A request's prompt or sampling parameters cannot be served."""


class InvalidConfigError(OutriderError, ValueError):
    """A setting of the engine is unknown, malformed or out of range."""


class ModelError(OutriderError):
    """A model cannot be loaded or used."""


class ModelNotFoundError(ModelError):
    """There is no model folder, or no such hub id, or the folder lacks a needed file."""


class UnsupportedModelError(ModelError):
    """The architecture, quantisation or file format is not supported."""


class CheckpointError(ModelError):
    """A checkpoint is truncated, incomplete or does not fit its configuration."""


class VocabularyMismatchError(ModelError):
    """Draft and target do not share a vocabulary (mere padding of the head is fine)."""


class OutOfBlocksError(OutriderError):
    """The KV cache has no room for one more sequence; close another one first."""


class WireError(OutriderError, ValueError):
    """Bytes from another process are no message of the protocol, or one that cannot be true."""


class SlowPeerError(OutriderError):
    """Messages for another process came faster than it read them."""


class WorkerError(OutriderError):
    """A worker process could not be started or reached."""


class TargetGroupError(OutriderError):
    """A rank of a tensor-parallel target is gone, and the target with it."""


class ClusterError(OutriderError):
    """A cluster could not be started, found or kept: Ray, its nodes, or the room on them."""


class TargetLostError(ClusterError):
    """The target that served a request is gone, and no other one can go on with it."""
