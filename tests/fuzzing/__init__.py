"""Readers under hostile bytes: a right object comes out or the documented refusal, never another exception."""
