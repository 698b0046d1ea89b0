"""Layer types that can be adapted, each seen as "a weight that acts". A host names a layer type and never a method."""

from peft.hosts import attention, conv, embedding, linear, parameter  # noqa: F401  (importing registers)
from peft.hosts.base import Host, host_class, supported

__all__ = ["Host", "host_class", "supported"]
