"""Loading a model as the secure side needs it: without the blocks' weights, which are the untrusted side's to hold."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from scx.architecture import (
    FINGERPRINT_ROWS,
    SUPPORTED,
    SUPPORTED_NAMES,
    keep_checkpoint,
    keep_query_rows,
    kept_query_rows,
    model_shape,
)
from scx.keys import SCXKeyGenerator, check_generator
from scx.party.plan import Plan
from scx.party.secure import secure_parameters, split_plan

__all__ = ["WeightBytes", "load_secure_model", "weight_bytes"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights: those that are `held` in this process, and of the `whole` model."""

    held: int
    whole: int

    def __str__(self) -> str:
        return f"{self.held:,} of {self.whole:,} bytes of weights"


def weight_bytes(model: PreTrainedModel) -> WeightBytes:
    """What a model's weights take, those that were loaded and all of them; tied weights count once."""
    parameters = list(model.parameters())
    kept = [rows for module in model.modules() if (rows := kept_query_rows(module)) is not None]
    return WeightBytes(
        held=sum(x.nbytes for x in (*parameters, *kept) if not x.is_meta), whole=sum(x.nbytes for x in parameters)
    )


class _Checkpoint:
    """The tensors of a safetensors checkpoint, in one file or several, read one by one.

    Args:
        path: a directory or hub id. Of a sharded checkpoint only the files that are read need be there.

    Raises: ValueError for any other checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._files = self._index()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, like: Tensor, rows: int | None = None) -> Tensor:
        """A tensor of the shape of `like`, or its first rows, in the dtype of `like` and memory of its own.

        Raises: ValueError if it is missing or is not what is expected.
        """
        if name not in self._files:
            raise ValueError(f"path: {self.path} has no tensor {name}")
        file = self._find(self._files[name])
        try:
            with safe_open(file, framework="pt") as opened:
                part = opened.get_slice(name)
                found, kind = part.get_shape(), part.get_dtype()
                if found != list(like.shape) or kind not in _DTYPES:
                    expected = f"{tuple(like.shape)} of {' or '.join(_DTYPES)}"
                    raise ValueError(f"path: {name} in {file} is {tuple(found)} of {kind}, expected {expected}")
                # A copy: what safetensors gives lies in the file, which would stay mapped.
                read: Tensor = part[:rows].to(like.dtype, copy=True)
                return read
        except SafetensorError as error:
            raise ValueError(f"path: {file} does not give {name}: {error}") from error

    def _index(self) -> dict[str, str]:
        """The file of every tensor, by name."""
        try:
            whole = self._find(SAFE_WEIGHTS_NAME)
        except OSError:
            return self._sharded_index()
        try:
            with safe_open(whole, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)
        except SafetensorError as error:
            raise ValueError(f"path: {whole} is no safetensors file: {error}") from error

    def _sharded_index(self) -> dict[str, str]:
        try:
            index = self._find(SAFE_WEIGHTS_INDEX_NAME)
        except OSError as error:
            raise ValueError(
                f"path: {self.path} is no safetensors checkpoint: expected {SAFE_WEIGHTS_NAME} or "
                f"{SAFE_WEIGHTS_INDEX_NAME}, from which single weights can be read"
            ) from error
        try:
            with open(index, encoding="utf-8") as opened:
                files = dict(json.load(opened)["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {index} is no index of a checkpoint: {error!r:.200}") from error
        for name, file in files.items():
            if not isinstance(file, str) or PurePath(file).name != file:
                raise ValueError(f"path: {index} expects {name} in {file!r:.80}, which is no name of a file beside it")
        return files

    def _find(self, name: str) -> str:
        """Where a file lies. Raises OSError if it is not there."""
        found: str = cached_file(self.path, name)
        return found


def load_secure_model(
    path: str | os.PathLike[str],
    key_generator: SCXKeyGenerator,
    *,
    dtype: torch.dtype = torch.float32,
    verify: bool = False,
) -> PreTrainedModel:
    """Load what the secure side of the split placement computes with, and nothing else.

    That is embedding, final norm and head, every block's attention norm and norms of heads, the output projections of
    protected blocks and, for noise, q, k and v of start blocks; they are read one by one. All other weights stay on the
    meta device, without data. `encode_llama(model, key_generator, secure_device, untrusted=...)` takes the model, with
    an untrusted party in another process.

    Args:
        path: a directory or hub id of Llama, Mistral, Qwen2 or Qwen3 with a language model's head, as safetensors.
        key_generator: says which blocks are protected, and whether there is noise.
        dtype: of the weights; the worker's must be the same.
        verify: whether it is to be encoded with `verify=True`. Norms before feed-forwards are loaded then, and
            `encode_llama` reads every other weight of the blocks once, one by one, and keeps none.

    Returns: the model, on the CPU, in evaluation mode, with the checkpoint's generation settings.
    Raises: TypeError, ValueError naming the argument, for another model or generator, and for a checkpoint that is not
        safetensors or in which a weight is missing or has another shape; OSError if there is none.
    """
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype: expected one of {[str(x) for x in _DTYPES.values()]}, got {dtype}")
    path = os.fspath(path)
    model = _empty_model(path, dtype)
    checkpoint = _Checkpoint(path)
    _fill_common(model, checkpoint)
    shape = model_shape(model)
    check_generator(key_generator, shape)
    _fill(model, checkpoint, _secure_names(model, split_plan(key_generator, shape, "paper", False, verify=verify)))
    if verify:
        prefix = _block_prefix(model)
        keep_checkpoint(model.base_model, lambda name, like: checkpoint.read(prefix + name, like))
    return model


def _empty_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights; rotary embedding and generation settings are as `from_pretrained` makes them."""
    config = AutoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None) is not None:
        raise TypeError(f"path: {path} is quantised; expected dense weights of {', '.join(_DTYPES)}")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    decoder = model.base_model
    if type(decoder) not in SUPPORTED:
        raise TypeError(f"path: expected a model of {SUPPORTED_NAMES}, got {type(decoder).__name__}")
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config)
    # A checkpoint may come without this file, and the model's own settings stand.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def _fill_common(model: PreTrainedModel, checkpoint: _Checkpoint) -> None:
    """Load what every secure side holds, and what the fingerprint covers besides."""
    decoder = model.base_model
    inside = _block_prefix(model)
    outer = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(inside)]
    absent = {name for name in outer if name not in checkpoint}
    _fill(model, checkpoint, [name for name in outer if name not in absent])
    model.tie_weights(missing_keys=absent, recompute_mapping=False)  # takes out of `absent` what is tied to the rest
    if absent:
        raise ValueError(f"path: {checkpoint.path} has no tensors {sorted(absent)}")
    _fill(model, checkpoint, _secure_names(model, Plan(len(decoder.layers), 0, 0)))
    name = f"{inside}0.self_attn.q_proj.weight"
    keep_query_rows(decoder, checkpoint.read(name, model.get_parameter(name), FINGERPRINT_ROWS))


def _block_prefix(model: PreTrainedModel) -> str:
    return f"{model.base_model_prefix}.layers."


def _secure_names(model: PreTrainedModel, plan: Plan) -> list[str]:
    prefix = _block_prefix(model)
    return [prefix + name for name in secure_parameters(model.base_model.layers, plan)]


def _fill(model: PreTrainedModel, checkpoint: _Checkpoint, names: Iterable[str]) -> None:
    """Give parameters on the meta device their data."""
    read = {name: checkpoint.read(name, model.get_parameter(name)) for name in names}
    model.load_state_dict(read, strict=False, assign=True)
