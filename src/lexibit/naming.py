"""Where a weight stands in a model and what it does there, as far as its name tells."""

from __future__ import annotations

import re

_NUMBERED = re.compile(r"(.*?\.\d+)\.")
# PyTorch's LSTM and GRU hold several layers
_RECURRENT = re.compile(r"(.*?)\.?weight_[ihr]+_l(\d+)")

# The last parts of a name, without "weight", by what the weight does; the first that fits counts.
_KINDS = {
    r"(.*_)?embeddings?(_.*)?|embed_.*|wte|wpe|shared|word_emb|encoder_emb": "embeddings",
    r".*(attention|attn|self)\.(query|q|q_lin|q_proj|query_proj)": "query",
    r".*(attention|attn|self)\.(key|k|k_lin|k_proj|key_proj)": "key",
    r".*(attention|attn|self)\.(value|v|v_lin|v_proj|value_proj)": "value",
    r".*attn\.c_attn": "query, key, value",
    r".*(attention\.output\.dense|(attention|attn)\.(dense|out_lin|out_proj|o_proj|o|c_proj))": (
        "attention output"
    ),
    r".*(intermediate\.dense|ffn|lin1|fc1|c_fc|gate_proj|up_proj|wi(_\d)?)": "intermediate",
    r".*(output\.dense|ffn_output|lin2|fc2|mlp\.c_proj|down_proj|wo)": "output",
    r".*weight_ih_l\d+(_reverse)?": "input",
    r".*weight_hh_l\d+(_reverse)?": "hidden state",
    r".*pooler(\.dense)?": "pooler",
}
_KINDS_COMPILED = [(re.compile(pattern), kind) for pattern, kind in _KINDS.items()]
_CROSS = re.compile(r"encoder_attn|EncDecAttention|crossattention", re.IGNORECASE)


def layer_of(name: str) -> str:
    """The layer of a weight: what stands under one number, like ``encoder.layer.3`` or ``rnns.0``.

    Of a weight without a number it is its module's place (``embeddings``, ``pooler``).
    """
    if match := _NUMBERED.match(name):
        return str(match[1])
    if match := _RECURRENT.match(name):
        return f"{match[1]}.l{match[2]}".removeprefix(".")
    parts = name.split(".")
    return ".".join(parts[:-2]) or parts[0]


def kind_of(name: str) -> str:
    """What a weight does in its layer: ``query``, ``attention output``, ``embeddings``, ...

    A name that tells nothing gives its module's own name; weights of attention to an encoder's output begin
    with ``cross``.
    """
    path = name.removesuffix(".weight")
    parts = path.split(".")
    if any(part in ("embeddings", "embed_tokens", "embed_positions") for part in parts):
        return "embeddings"
    for pattern, kind in _KINDS_COMPILED:
        if pattern.fullmatch(path.lower()) or pattern.fullmatch(parts[-1].lower()):
            return f"cross {kind}" if _CROSS.search(path) else kind
    return parts[-1]


def in_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """A key that sorts weights as they stand in models: embeddings, layers by number, what follows."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
    numbered = any(number >= 0 for number, _ in parts)
    return 1 if numbered else 0 if kind_of(name) == "embeddings" else 2, parts
