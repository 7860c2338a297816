"""Where the policy comes from: a local Hugging Face directory, or a fresh model with its own tokenizer."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from . import adapters
from .folder import RunFolder
from .model_config import ModelConfig

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
# Byte-level BPE starts from all 256 bytes, so no text is ever unknown.
MIN_VOCAB = 256 + 3


def load_model(path: str | PathLike[str], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a local Hugging Face directory; nothing is downloaded.

    The tokenizer pads on the left, as generation needs; without a padding token the end token serves.

    Args:
        path: folder as `save_pretrained` writes it, with PEFT adapters or without, or a run folder of `react-fast
            train`: its newest complete checkpoint.
        dtype: of the parameters.
    Returns: (model in evaluation mode, tokenizer).
    Raises: FileNotFoundError without folder, config.json, weights or tokenizer; ValueError if the folder
        holds something else than a causal language model, its weights are damaged or incomplete, or the
        tokenizer has more tokens than the model. Each is one line.
    """
    folder = model_folder(path)
    adapted = (folder / adapters.CONFIG).is_file()
    base = adapters.base_folder(folder) if adapted else folder
    if not (base / "config.json").is_file():
        raise FileNotFoundError(f"model folder {base} has no config.json")
    tokenizer = _load_tokenizer(folder)
    model = load_weights(base).to(dtype)
    if adapted:
        model = adapters.load_adapters(model, folder, base=base)
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"model folder {folder}: the tokenizer has {len(tokenizer)} tokens, the model only {embeddings}"
        )
    return model.eval(), tokenizer


def model_folder(path: str | PathLike[str]) -> Path:
    """The folder itself, or the newest complete checkpoint of a run folder.

    Raises: FileNotFoundError if there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model path must be a local folder, got {folder}, which does not exist or is a file"
        )
    return RunFolder(folder).newest_checkpoint() if (folder / "checkpoints").is_dir() else folder


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder as it is.

    Raises: FileNotFoundError without one, ValueError for one that cannot be read.
    """
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise FileNotFoundError(
            f"model folder {folder} has no tokenizer (tokenizer.json, tokenizer.model, vocab.*)"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # each tokenizer backend raises its own, down to bare Exception
        raise ValueError(
            f"model folder {folder}: the tokenizer cannot be read: {_first_line(error)}"
        ) from error


def _load_tokenizer(folder: Path) -> Any:
    tokenizer = read_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model folder {folder}: the tokenizer has no end-of-text token (eos_token)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_weights(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model of a folder, by one of the Auto classes; every weight comes from the folder.

    Raises: FileNotFoundError without weights, ValueError for damaged, missing or other ones.
    """
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"model folder {folder} has no weights (*.safetensors or *.bin)")
    try:
        loaded = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError, ...
        raise ValueError(f"model folder {folder} cannot be loaded: {_first_line(error)}") from error
    model, report = loaded
    # transformers fills a parameter that the file lacks with random numbers and only warns.
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            names = sorted(map(str, report[problem]))
            raise ValueError(
                f"model folder {folder}: {len(names)} {problem.replace('_', ' ')}, first {names[0]}"
            )
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def fresh_model(
    texts: Iterable[str],
    *,
    vocab_size: int = 512,
    hidden_size: int = 256,
    layers: int = 4,
    heads: int = 4,
    max_length: int = 128,
    seed: int = 0,
    dropout: float = 0.0,
) -> tuple[Any, Any]:
    """A freshly initialised model and a byte-level BPE tokenizer trained on `texts`: the random policy.

    The architecture is StarCoder2 (pre-norm decoder, rotary positions, tied embeddings): of those whose
    folders the Auto classes load back unchanged, it is one with dropout on embeddings, attention and
    residuals. (For a Qwen2 folder AutoTokenizer replaces the tokenizer's class and adds a token.)

    Same arguments, same weights and tokenizer; the global random state is left as it was. Both save with
    `save_pretrained` and load with transformers' Auto classes.

    Args:
        texts: what the tokenizer learns its merges from, such as every training prompt and reference.
        vocab_size: entries of the tokenizer, at least 259; fewer come out if the texts have too few merges.
        hidden_size: width of the residual stream, an even multiple of `heads`.
        layers, heads: of the transformer.
        max_length: longest prompt plus answer, in tokens.
        seed: of the weights.
        dropout: of embeddings, attention weights and residual branches, in [0, 1); in training mode only.
    Returns: (model in evaluation mode, float32; tokenizer that pads on the left).
    Raises: ValueError for a size out of range or for no texts.
    """
    _positive(layers=layers, heads=heads, max_length=max_length, hidden_size=hidden_size)
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB} (256 bytes and 3 marks), got {vocab_size}")
    if hidden_size % (2 * heads):
        raise ValueError(f"hidden_size must be an even multiple of heads ({heads}), got {hidden_size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    tokenizer = _train_tokenizer(texts, vocab_size, max_length)
    config = _fresh_config(tokenizer, hidden_size, layers, heads, max_length, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Starcoder2ForCausalLM(config)
    model.generation_config = GenerationConfig(**_marks(tokenizer))
    return model.eval(), tokenizer


def outline(config: ModelConfig, texts: Iterable[str]) -> tuple[Any, Any]:
    """(the policy of a configuration as fake tensors: shapes without memory, no weights read; its tokenizer).

    Args:
        config: of the model.
        texts: what a fresh tokenizer learns from.
    Raises: as `load_model` and `fresh_model`, weights aside.
    """
    shape: Any
    if config.path is None:
        tokenizer = _train_tokenizer(texts, config.vocab_size, config.max_length)
        sizes = (config.hidden_size, config.layers, config.heads, config.max_length, config.dropout)
        shape, adapted = _fresh_config(tokenizer, *sizes), None
    else:
        folder = model_folder(config.path)
        adapted = folder if (folder / adapters.CONFIG).is_file() else None
        base = adapters.base_folder(folder) if adapted else folder
        tokenizer, shape = (
            _load_tokenizer(folder),
            AutoConfig.from_pretrained(str(base), local_files_only=True),
        )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype)).eval()
        if adapted or config.lora.r:
            model = adapters.outline_adapters(model, adapted, config.lora)
    return _faked(model), with_template(tokenizer, config.chat_template)


def with_template(tokenizer: Any, path: str | None) -> Any:
    """The tokenizer with the chat template of a Jinja file, if one is given.

    Raises: ValueError if the file cannot be read.
    """
    if path is None:
        return tokenizer
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"model.chat_template {path} cannot be read: {_first_line(error)}") from None
    return tokenizer


def _faked(model: Any) -> Any:
    """Tensors on the meta device as fake ones on a CPU, for which an operator's kernel is chosen as on a CPU."""
    made: dict[int, torch.Tensor] = {}
    with FakeTensorMode():
        for module in model.modules():
            for name, x in {**module._parameters, **module._buffers}.items():
                if x is None:
                    continue
                if id(x) not in made:  # tied ones stay one
                    fake = torch.empty(x.shape, dtype=x.dtype)
                    is_parameter = isinstance(x, torch.nn.Parameter)
                    made[id(x)] = torch.nn.Parameter(fake, x.requires_grad) if is_parameter else fake
                (module._parameters if name in module._parameters else module._buffers)[name] = made[id(x)]
    return model


def _marks(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _fresh_config(
    tokenizer: Any, hidden_size: int, layers: int, heads: int, max_length: int, dropout: float
) -> Starcoder2Config:
    return Starcoder2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        embedding_dropout=dropout,
        attention_dropout=dropout,
        residual_dropout=dropout,
        tie_word_embeddings=True,
        **_marks(tokenizer),
    )


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = list(texts)
    if not any(texts):
        raise ValueError("texts must hold at least one text that is not empty")
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
