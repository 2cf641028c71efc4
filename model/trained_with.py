"""Compare the models of a corpus' columns with those that a checkpoint was trained with."""

from collections.abc import Mapping
from typing import Any

from microdit.model.loading import Part, Parts

Declared = Mapping[str, Mapping[str, Any]]  # what made a column, by the column's name


def differences(parts: Parts, latents: Declared, text: Declared, sigma_data: float) -> list[str]:
    """Say, in words, what columns and sigma_data differ in from those that a checkpoint was trained with."""
    wrong = []
    for column, declared in latents.items():
        wrong += _model_difference(parts.autoencoder, column, declared, "autoencoder")
    for column, declared in text.items():
        wrong += _model_difference(parts.text_encoder, column, declared, "encoder")
        if parts.text_encoder.trained_with is None:  # a released one: all 77 positions, in float16
            if declared.get("model", {}).get("trim") and not parts.text_encoder.options.get("trim"):
                wrong.append(f"{column} is trimmed, the weights were trained on the padding too")
            if declared.get("storage", "float16") != "float16":
                wrong.append(f"{column} is stored as {declared['storage']}, the weights were trained on float16")
    if sigma_data != parts.edm.sigma_data:
        wrong.append(f"sigma_data is {sigma_data}, the weights were trained with {parts.edm.sigma_data}")
    return wrong


def _model_difference(part: Part, column: str, declared: Mapping[str, Any], kind: str) -> list[str]:
    if part.trained_with is not None:
        if part.trained_with != declared.get("model"):
            return [
                f"{column} is of another {kind} than the weights ({declared.get('model')}, not {part.trained_with})"
            ]
    elif declared.get(kind) != part.name:
        return [f"{column} is of {kind} {declared.get(kind)}, the weights are of {part.name}"]
    return []
