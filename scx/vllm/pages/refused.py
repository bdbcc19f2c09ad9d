"""What stands in for vLLM's other attention backends while pages are to be sealed: it refuses, by name."""

from typing import Any

from vllm.v1.attention.backend import AttentionBackend

__all__ = ["UnsealedBackend", "UnsealedStateBackend"]

_REASON = "SCX_SEAL_PAGES=1: it would keep its pages unsealed"


class UnsealedBackend(AttentionBackend):
    """Any attention backend that seals nothing: of MLA, of sparse attention, of another device."""

    @staticmethod
    def get_name() -> str:
        return "UNSEALED"

    @classmethod
    def validate_configuration(cls, *args: Any, **options: Any) -> list[str]:
        return [_REASON]

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError(f"this model's attention backend is refused. {_REASON}")

    @staticmethod
    def get_builder_cls() -> Any:
        return UnsealedBackend.get_impl_cls()


class UnsealedStateBackend(UnsealedBackend):
    """A backend of layers that keep a state instead of rows, which is not sealed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.get_impl_cls()
