"""config.json in Hugging Face's format, read strictly."""

from dataclasses import dataclass

# Keys of config.json that change the computation in a way that is not built here: anything but these values is refused.
SUPPORTED = {
    "model_type": ("llama", "mistral", "qwen2"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (1.0,),
    "attention_dropout": (0.0,),
    "is_causal": (True,),
    "tie_word_embeddings": (True, False),
    "architectures": (
        None,
        *([f"{family}ForCausalLM"] for family in ("Llama", "Mistral", "Qwen2")),
    ),
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
LARGEST = {
    "num_hidden_layers": 1000,
    "head_dim": 2**14,
}  # beyond: no model, but hours in building one; of all other sizes 2**20
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or llama3's four numbers (read_rope_scaling)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2: bias on q, k and v

    @classmethod
    def from_hf(cls, hf: dict) -> "LlamaConfig":
        """Read a Hugging Face config.json. Raises ValueError naming the key and value of anything that is not implemented."""
        for key in ("model_type", *REQUIRED):
            if hf.get(key) is None:
                raise ValueError(f"{key} is missing")
        for key in (*REQUIRED, "num_key_value_heads", "head_dim"):
            if hf.get(key) is not None and not (
                type(hf[key]) is int and 0 < hf[key] <= LARGEST.get(key, 2**20)
            ):
                raise ValueError(
                    f"{key} = {hf[key]!r:.80} is no positive integer of a model's size"
                )
        for key, allowed in SUPPORTED.items():
            if key in hf and hf[key] not in allowed:
                raise ValueError(
                    f"{key} = {hf[key]!r} is not implemented; known: {', '.join(map(repr, allowed))}"
                )
        window = (
            hf.get("sliding_window", 4096) if hf["model_type"] == "mistral" else None
        )  # Mistral's default
        if window is not None:
            raise ValueError(f"sliding_window = {window} is not implemented; only null")
        n_heads = hf["num_attention_heads"]
        n_kv_heads = hf.get("num_key_value_heads") or n_heads
        if not hf.get("head_dim") and hf["hidden_size"] % n_heads:
            raise ValueError(
                f"hidden_size = {hf['hidden_size']} is no multiple of num_attention_heads = {n_heads}"
            )
        head_dim = hf.get("head_dim") or hf["hidden_size"] // n_heads
        if n_heads % n_kv_heads:
            raise ValueError(
                f"num_attention_heads = {n_heads} is no multiple of num_key_value_heads = {n_kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim = {head_dim} is odd; RoPE rotates pairs")
        rope = read_rope(hf)
        return cls(
            hf["vocab_size"],
            hf["hidden_size"],
            hf["intermediate_size"],
            hf["num_hidden_layers"],
            n_heads,
            n_kv_heads,
            head_dim,
            number(rope, "rope_theta", 10000.0),
            read_rope_scaling(rope),
            number(hf, "rms_norm_eps", 1e-6),
            hf.get("tie_word_embeddings", False),
            qkv_bias=hf["model_type"] == "qwen2",
        )


def number(settings, key, default=None):
    """A positive finite number, or the default of a key that is absent or null."""
    value = settings.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{key} = {value!r:.80} is no positive number of a model")
    return float(value)


def read_rope(hf) -> dict:
    """RoPE's settings from either spelling, `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5).
    ValueError names a setting that is not implemented, or that the two spellings set differently."""
    rope = {"rope_theta": hf["rope_theta"]} if hf.get("rope_theta") is not None else {}
    for spelling in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(spelling) or {}, dict):
            raise ValueError(
                f"{spelling} = {hf[spelling]!r} is not implemented; expected an object"
            )
        for key, value in (hf.get(spelling) or {}).items():
            name = "rope_type" if key == "type" else key
            if name not in ("rope_theta", "rope_type", *LLAMA3_ROPE):
                raise ValueError(f"{spelling}: {key} = {value!r} is not implemented")
            if value is not None and rope.setdefault(name, value) != value:
                raise ValueError(
                    f"{spelling}: {key} = {value!r}, but {rope[name]!r} elsewhere in the file"
                )
    return rope


def read_rope_scaling(rope: dict) -> dict | None:
    """The four numbers of llama3 scaling; None for plain RoPE."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type = {kind!r} is not implemented; known: 'default', 'llama3'")
    if kind == "default":
        if found := rope.keys() & set(LLAMA3_ROPE):
            raise ValueError(
                f"rope_type = 'default' with {', '.join(sorted(found))}: which scaling is meant?"
            )
        return None
    scaling = {key: number(rope, key) for key in LLAMA3_ROPE}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor = {scaling['low_freq_factor']} is not below high_freq_factor"
        )
    return scaling
