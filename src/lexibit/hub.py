"""The Hugging Face hub: a quantized folder's model card, and the folder's upload."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from yaml import YAMLError

from lexibit import checkpoint
from lexibit.errors import LexibitError
from lexibit.files import write_text
from lexibit.scores import ScoreLine

TAG = "lexibit"
README = "README.md"
# what a float model's card says of that model's quality, which is not the quantized one's
_RESULTS = ("model-index", "eval_results")


def card(
    folder: str | Path,
    name: str | None = None,
    base_model: str | None = None,
    scores: Sequence[ScoreLine] = (),
) -> str:
    """The model card of a quantized folder: what it is, how large, and how to load it.

    The README that came with the float model stands below, and its front matter is kept but for results. A
    card of ours, with the tag ``lexibit``, is the folder's own from then on and returned as it is.

    Args:
        folder: quantized.
        name: the hub name that it will have; the folder's own if not given.
        base_model: the hub name of the float model.
        scores: what is known of its quality.

    Raises:
        LexibitError: the folder is not quantized, is damaged, or has a README that cannot be read, or that
            is such a card with another base model or without these scores.
    """
    folder = Path(folder)
    if folder.is_file():
        raise LexibitError(f"{folder}: only the folder of a model has a card")
    facts = facts_of(folder)
    scored = _scores(scores)
    before = _readme(folder)
    kept: dict[str, Any] = before.data.to_dict()  # type: ignore[no-untyped-call]
    given = kept.get("tags") or []
    tags = [given] if isinstance(given, str) else list(given)
    if TAG in tags:
        if base_model not in (None, kept.get("base_model")):
            raise LexibitError(f"{folder / README}: has another base_model already: change it there")
        text = (folder / README).read_text(encoding="utf-8")
        if missing := [line for line in _rows(facts) if line not in text]:
            raise LexibitError(
                f"{folder / README}: tells of another quantization, without {missing[0]!r}: correct or "
                "remove it"
            )
        if missing := [line for line in scored if line not in text]:
            raise LexibitError(
                f"{folder / README}: is this model's card already, without the line {missing[0]!r}: add it "
                "there, or remove the card"
            )
        return text
    for results in _RESULTS:
        kept.pop(results, None)
    if base_model is not None:
        kept |= {"base_model": base_model, "base_model_relation": "quantized"}
    tags += [TAG, *({"quantized"} - set(tags))]
    data = ModelCardData(**{"library_name": "transformers"} | kept | {"tags": tags})
    name = name or folder.resolve().name
    made_from = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a float model"
    lines = [
        f"# {name}",
        "",
        f"Made from {made_from} by lexibit: each weight is a short code that points into a small table.",
        "",
        "| | |",
        "|---|---|",
        *_rows(facts),
        "",
        *scored,
        "```python",
        *loading(folder, name),
        "```",
        "",
        f"For tools that do not know lexibit: `lexibit dequantize {name} ./float`.",
    ]
    if before.text.strip():
        lines += ["", "What follows is the float model's own card.", "", before.text.strip()]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def push(folder: str | Path, name: str, *, private: bool = False, base_model: str | None = None) -> str:
    """Upload a quantized folder to the hub, with a model card (:func:`card`), written to its README.md.

    The folder is verified first (``lexibit verify``). The repository is made if there is none. The hub's own
    settings say who uploads: ``hf auth login``, or ``HF_TOKEN``.

    Args:
        folder: quantized.
        name: on the hub, ``USER/NAME``.
        private: whether a new repository is private.
        base_model: the hub name of the float model, for the card.

    Returns:
        The address of the repository.

    Raises:
        LexibitError: the folder is not quantized, not a model, or damaged; or the hub did not take it.
    """
    folder = Path(folder)
    checkpoint.verify(folder)
    if not (folder / "config.json").is_file():
        raise LexibitError(f"{folder}: no config.json in it: only the folder of a model is uploaded")
    text = card(folder, name, base_model)
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        # the hub knows the name and who uploads
        write_card(folder, text)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Upload a model quantized by lexibit"
        )
    except LexibitError:
        raise
    except HFValidationError as error:
        raise LexibitError(f"{name}: no hub name: write USER/NAME") from error
    except Exception as error:  # what a connection raises depends on the hub's client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "Connect" in type(error).__name__:
            raise LexibitError(f"{name}: the hub was not reached: {reason}") from error
        raise LexibitError(
            f"{name}: the hub did not take it: {reason}: log in (hf auth login) with a token "
            "that may write there"
        ) from error
    return str(url)


def write_card(folder: Path, text: str) -> None:
    """Write a folder's README.md.

    Raises:
        LexibitError: it cannot be written.
    """
    write_text(folder / README, text)


def facts_of(folder: Path) -> dict[str, str]:
    """What was done to a quantized folder or file, and how large it is.

    Raises:
        LexibitError: it is not quantized, or damaged.
    """
    contents = checkpoint.inspect(folder)
    specs = contents.weights.values()
    asked = read_config(folder).get("quantization_config") or {}
    groups = str(asked.get("groups", "as the file says"))
    if rules := asked.get("rules"):
        groups += f"; {len(rules)} rules for some weights"
    return {
        "scheme": ", ".join(sorted({spec.scheme for spec in specs})),
        "bits of a code": ", ".join(map(str, sorted({spec.bits for spec in specs}))),
        "weights that share levels": groups,
        "calibrated on text": "yes" if (folder / checkpoint.CALIBRATION).is_file() else "no",
        "weights in codes": f"{len(specs)}, of {contents.bits_per_weight:.3f} stored bits a weight",
        "parameters": f"{contents.parameters:,}, of {contents.file_bits_per_parameter:.3f} bits on disk each",
        "size on disk": f"{contents.file_bytes:,} bytes",
    }


def _rows(facts: dict[str, str]) -> list[str]:
    return [f"| {fact} | {value} |" for fact, value in facts.items()]


def _scores(scores: Sequence[ScoreLine]) -> list[str]:
    """A table of scores; no line without any."""
    if not scores:
        return []
    rows = [
        " | ".join(
            text.replace("|", "\\|")
            for text in (one.model, f"{one.task} ({one.split})", one.metric, one.text, str(one.examples))
        )
        for one in scores
    ]
    heading = ["| model | task | metric | score (95 % interval) | examples |", "|---|---|---|---|---|"]
    return [*heading, *(f"| {row} |" for row in rows), ""]


def _readme(folder: Path) -> ModelCard:
    file = folder / README
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        return ModelCard(text, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError) as error:
        raise LexibitError(f"{file}: cannot be read ({error}): correct or remove it") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What stands in a folder's config.json, nothing if it has none.

    Raises:
        LexibitError: it cannot be read.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known = isinstance(config, dict) and isinstance(config.get("quantization_config") or {}, dict)
        if not known or not isinstance(config.get("architectures") or [], list):
            raise ValueError("it is no configuration of a model")
    except (OSError, ValueError, RecursionError) as error:
        raise LexibitError(f"{file}: cannot be read ({error}): correct it") from error
    return config


def loading(folder: Path, name: str) -> list[str]:
    """Lines of Python that load a folder under its name on the hub, or a file."""
    if folder.is_file():
        return [
            "from pathlib import Path",
            "from lexibit import format",
            "",
            f"tensors = format.read([Path({name!r})])",
        ]
    if (folder / "modules.json").is_file():
        return [
            "import lexibit",
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("{name}")',
        ]
    cls = (read_config(folder).get("architectures") or ["AutoModel"])[0]
    return [
        "import lexibit",
        f"from transformers import AutoTokenizer, {cls}",
        "",
        f'model = {cls}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
