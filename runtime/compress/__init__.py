"""Compressed collectives: what is done to a group's buffers before their messages are sent and after others came in."""

from runtime.compress.messages import pack, unpack

__all__ = ["pack", "unpack"]
