"""Layer types that can be adapted, each seen as "a weight that acts". A host names a layer type and never a method."""

from peft.hosts import attention, bitsandbytes, conv, embedding, hqq, linear, opaque, parameter, tensors  # noqa: F401
from peft.hosts.base import Host, supported
from peft.hosts.lookup import host_class

__all__ = ["Host", "host_class", "supported"]
