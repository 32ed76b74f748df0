"""Every way to fail: the HTTP status before a request_id exists, the category after.

XorlError             status  category
├─ InvalidRequest        400  user     names the field: data[3].loss_fn_inputs.advantages
├─ Unauthorized          401  user
├─ Forbidden             403  user     a reserved checkpoint
├─ UnknownId             404  user     model, future, checkpoint: says which, and what there is
├─ BodyTooLarge          413  user
├─ QueueFull             429  user
├─ StorageFull           507  server
├─ Asleep                503  user     weights are off the GPU until /wake_up
├─ NonFinite             400  user     loss, log-probability or gradient is NaN or infinite: names the datum
├─ OutOfMemory           500  server   after halving the batch did not help
├─ CheckpointError       400  user     names the file and what is wrong with it
├─ InternalError         500  server   our own mistake: the engine's message, never hidden
└─ EngineLost            503  server
"""

from typing import ClassVar, Literal

Category = Literal["user", "server", "unknown"]


class XorlError(Exception):
    """Base of all errors that a caller of the server can see; `str(error)` is what they read."""

    status: ClassVar[int] = 500
    category: ClassVar[Category] = "server"


class InvalidRequest(XorlError):
    status = 400
    category = "user"


class Unauthorized(XorlError):
    status = 401
    category = "user"


class Forbidden(XorlError):
    status = 403
    category = "user"


class UnknownId(XorlError):
    status = 404
    category = "user"


class BodyTooLarge(XorlError):
    status = 413
    category = "user"


class QueueFull(XorlError):
    status = 429
    category = "user"


class StorageFull(XorlError):
    status = 507


class Asleep(XorlError):
    status = 503
    category = "user"


class NonFinite(XorlError):
    status = 400
    category = "user"


class OutOfMemory(XorlError):
    pass


class CheckpointError(XorlError):
    status = 400
    category = "user"


class InternalError(XorlError):
    pass


class EngineLost(XorlError):
    status = 503


def by_name(name: str, message: str) -> XorlError:
    """Rebuild an error that crossed a process boundary as its class name and text."""
    for kind in XorlError.__subclasses__():
        if kind.__name__ == name:
            return kind(message)
    return InternalError(message)
