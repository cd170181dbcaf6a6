"""Sparse dictionaries: trained sparse autoencoders (SAEs) in the file format of SAELens, evaluated with numpy.

A dictionary has F features in the space of one attention layer's head outputs z float32[d], where d = heads x d_head.
A feature is active where its pre-activation exceeds its threshold (JumpReLU: Rajamanoharan et al. 2024,
arXiv:2407.14435).

A directory holds `cfg.json` (the card) and `sae_weights.safetensors`; `sae-lens` reads the same two files. This module
needs no torch. Nothing is ever unpickled, and sizes are checked before arrays are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from broker_filter.config import Section
from broker_filter.errors import BrokerFilterError
from broker_filter.scoring.bundle import MAX_CARD_BYTES, ModelName, Sha256, describe_problems

CONFIGURATION = "cfg.json"
DICTIONARY_WEIGHTS = "sae_weights.safetensors"
MAX_INPUTS = 4096
"""Largest d. The widest attention layer of the networks here has 512 dimensions."""
MAX_FEATURES = 2**16
"""Largest F. Dictionaries of these networks have at most some thousand features."""
MAX_HEADER_BYTES = MAX_CARD_BYTES
"""Bytes that a weights file may have in addition to its arrays; a header with five arrays has some hundred."""
MAX_TEXT = 1000
"""Characters of a text in the card."""


class DictionaryError(BrokerFilterError):
    """A sparse dictionary cannot be used. The message says which file, what is wrong with it and what to do."""


class DictionarySource(Section):
    """The activations that a dictionary was trained on: bundle, attention layer and split of the alerts."""

    bundle: ModelName = Field(description="Name of the bundle whose network gave the activations.")
    version: str = Field(max_length=MAX_TEXT, description="Version of the bundle.")
    weights_sha256: Sha256 = Field(description="sha256 of the weights of the network.")
    site: str = Field(min_length=1, max_length=MAX_TEXT, description="Name of the attention layer.")
    heads: int = Field(gt=0, le=MAX_INPUTS, description="Attention heads of the layer.")
    d_head: int = Field(gt=0, le=MAX_INPUTS, description="Dimensions of a head's output.")
    split: str = Field(max_length=MAX_TEXT, description="The alerts that the dictionary was trained on.")
    sae_lens_version: Literal["6.0.0"] = Field(
        default="6.0.0", description="Version of SAELens's format: without it, sae-lens discards the metadata."
    )


class DictionaryCard(Section):
    """The contents of `cfg.json`, with the keys of SAELens. Values that would change the equation are refused."""

    architecture: Literal["jumprelu"] = "jumprelu"
    d_in: int = Field(gt=0, le=MAX_INPUTS, description="Dimensions of z.")
    d_sae: int = Field(gt=0, le=MAX_FEATURES, description="Number of features.")
    dtype: Literal["float32"] = "float32"
    device: Literal["cpu"] = "cpu"
    apply_b_dec_to_input: Literal[True] = True
    normalize_activations: Literal["none"] = "none"
    reshape_activations: Literal["none"] = "none"
    metadata: DictionarySource

    @model_validator(mode="after")
    def _heads_fill_the_input(self) -> DictionaryCard:
        if (made := self.metadata.heads * self.metadata.d_head) != self.d_in:
            raise ValueError(f"d_in is {self.d_in}, but metadata.heads x metadata.d_head is {made}")
        return self


@dataclass(frozen=True, slots=True)
class SparseDictionary:
    """F features in d dimensions; all arrays are finite, and no threshold is negative."""

    w_enc: NDArray[np.float32]  # [d, F]
    b_enc: NDArray[np.float32]  # [F]
    w_dec: NDArray[np.float32]  # [F, d]
    b_dec: NDArray[np.float32]  # [d]
    threshold: NDArray[np.float32]  # [F]

    def pre_activations(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (z - b_dec) w_enc + b_enc, float32[N, F], for z float32[N, d]."""
        centred: NDArray[np.float32] = z - self.b_dec
        return centred @ self.w_enc + self.b_enc

    def encode(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the activations of the features, float32[N, F], for z float32[N, d].

        An activation is the pre-activation where this is greater than the threshold, and otherwise 0.
        """
        pre = self.pre_activations(z)
        return pre * (pre > self.threshold)

    def decode(self, activations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the reconstruction of z, float32[N, d], from activations float32[N, F]."""
        return activations @ self.w_dec + self.b_dec


def read_dictionary(directory: Path) -> tuple[SparseDictionary, DictionaryCard]:
    """Read a dictionary and its card.

    Raises DictionaryError if a file is absent, too large or damaged, or if the weights do not fit the card.
    """
    card_file, weights_file = directory / CONFIGURATION, directory / DICTIONARY_WEIGHTS
    try:
        if (size := card_file.stat().st_size) > MAX_CARD_BYTES:
            raise DictionaryError(f"{card_file}: has {size} bytes; a card may have at most {MAX_CARD_BYTES}")
        card = DictionaryCard.model_validate_json(card_file.read_bytes())
        expected = _shapes(card)
        largest = sum(np.dtype(np.float32).itemsize * int(np.prod(shape)) for shape in expected.values())
        if (size := weights_file.stat().st_size) > largest + MAX_HEADER_BYTES:
            raise DictionaryError(
                f"{weights_file}: has {size} bytes, but the arrays that {CONFIGURATION} describes have {largest}: "
                "give the two files of one dictionary"
            )
        arrays = load_file(weights_file)
    except OSError as error:
        raise DictionaryError(
            f"{directory}: not a sparse dictionary, which is the two files {CONFIGURATION} and {DICTIONARY_WEIGHTS}: "
            f"{error.strerror or error}"
        ) from error
    except ValidationError as error:
        raise DictionaryError(f"{card_file}: {describe_problems(error)}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise DictionaryError(f"{weights_file}: not a safetensors file: {error}; copy the dictionary again") from error
    wanted = {name: (shape, np.dtype(np.float32)) for name, shape in expected.items()}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if found != wanted:
        raise DictionaryError(f"{weights_file}: holds {_describe(found)}; {CONFIGURATION} requires {_describe(wanted)}")
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise DictionaryError(f"{weights_file}: {broken[0]} holds NaN or infinite values; train the dictionary again")
    if (arrays["threshold"] < 0).any():
        raise DictionaryError(f"{weights_file}: a threshold is negative; a ReLU has the threshold 0")
    dictionary = SparseDictionary(
        arrays["W_enc"], arrays["b_enc"], arrays["W_dec"], arrays["b_dec"], arrays["threshold"]
    )
    return dictionary, card


def write_dictionary(directory: Path, dictionary: SparseDictionary, source: DictionarySource) -> None:
    """Write the two files of a dictionary into `directory`, which is made if needed; `cfg.json` is written last."""
    d, features = dictionary.w_enc.shape
    card = DictionaryCard(d_in=d, d_sae=features, metadata=source)
    arrays = {
        "W_enc": dictionary.w_enc,
        "b_enc": dictionary.b_enc,
        "W_dec": dictionary.w_dec,
        "b_dec": dictionary.b_dec,
        "threshold": dictionary.threshold,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIGURATION).unlink(missing_ok=True)  # it must not describe the weights of another dictionary
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    save_file(contiguous, directory / DICTIONARY_WEIGHTS)
    partial = directory / f"{CONFIGURATION}.partial"
    partial.write_text(card.model_dump_json(indent=2) + "\n")
    partial.replace(directory / CONFIGURATION)


def _shapes(card: DictionaryCard) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in the weights file, by the names of SAELens."""
    d, features = card.d_in, card.d_sae
    return {
        "W_enc": (d, features),
        "b_enc": (features,),
        "W_dec": (features, d),
        "b_dec": (d,),
        "threshold": (features,),
    }


def _describe(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[np.float32]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in sorted(arrays.items())) or "no arrays"
