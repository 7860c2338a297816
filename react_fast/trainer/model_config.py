"""The policy's section of the configuration."""

from typing import Literal

from pydantic import Field, model_validator

from .section import ConfigError, Count, Few, Fraction, Natural, Section


class LoraConfig(Section):
    """Low-rank adapters (PEFT): the model's own weights stay, and are the reference policy too."""

    r: Natural = 0
    """Rank; 0: no adapters, all weights are trained."""
    alpha: Count = 16
    """The adapters' output is scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout probability before the adapters, in supervised training."""
    target_modules: list[str] = Field(default=[])
    """Names of the linear layers that get one; none: all but the output layer."""


class ModelConfig(Section):
    """The policy: a Hugging Face causal-LM directory, or a freshly initialised model."""

    path: str | None = None
    """Local Hugging Face model directory; none: a fresh model."""
    vocab_size: Count = 512
    """Fresh model: entries of the trained tokenizer."""
    hidden_size: Count = 256
    """Fresh model: width of the residual stream."""
    layers: Few = 4
    """Fresh model: transformer layers."""
    heads: Count = 4
    """Fresh model: attention heads; must divide hidden_size."""
    max_length: Count = 128
    """Fresh model: longest prompt plus response, in tokens."""
    dropout: Fraction = 0.0
    """Fresh model: dropout probability."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of the parameters."""
    chat_template: str | None = None
    """Jinja file of the chat template for prompts of messages; none: the tokenizer's own."""
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.hidden_size % self.heads:
            raise ConfigError("heads", f"must divide hidden_size {self.hidden_size}, got {self.heads}")
        return self
