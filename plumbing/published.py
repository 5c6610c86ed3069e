"""Numbers to compare a run with: what is published about OpenAI's GPT-2, and what the demo gives."""

# OpenAI's models on the Hugging Face hub, openai-community/NAME: the commit, and the sha256 of model.safetensors there,
# if it is known
MODELS = {
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
PARAMETERS = 124_439_808  # of gpt2

# GPT-2 124M on FineWeb-Edu: nats per token over the first 10,485,760 validation tokens, in windows of 1,024
LOSS = 3.2924
LOSS_TOKENS = 10_485_760
LOSS_WINDOW = 1024

# (acc, acc_norm) on the 10,042 validation examples of HellaSwag, as build-nanogpt and lm-eval score them
HELLASWAG_EXAMPLES = 10_042
HELLASWAG = {
    ("gpt2", "completion"): (0.2859, 0.2955), ("gpt2", "harness"): (0.2892, 0.3114),
    ("gpt2-xl", "completion"): (0.3842, 0.4893), ("gpt2-xl", "harness"): (0.4004, 0.5089),
}
HELLASWAG_ACC_NORM = HELLASWAG["gpt2", "completion"][1]

# The demo: the settings that define its loss, the hash of its validation tokens, and the loss in nats per token.
# Measured with PyTorch 2.13 in float32: 4.7391 on an AMD EPYC (Zen 5); 4.7279 with two threads and 4.7386 with one on a
# Xeon (AVX-512); 4.7365 and 4.73 with AVX2. The tolerance is three times the largest deviation.
DEMO = {
    "settings": {
        "init_from": "", "branch_from": "", "seed": 1337, "model": "demo", "n_layer": 0, "n_head": 0, "n_embd": 0,
        "total_batch_size": 1024, "sequence_length": 64, "shuffle": True, "max_steps": 180, "optimizer": "muon",
        "max_lr": 0.03, "min_lr": 0.0, "warmup_steps": 20, "decay": "cosine", "decay_steps": 0, "weight_decay": 0.0,
        "grad_clip": 1.0, "dtype": "float32",
    },
    "val_sha256": "ebfbbf2b8fb8998bfaa21ee7fa619eda56ce123961683fe03b5928935e174b9c",
    "loss": 4.73,
    "tolerance": 0.03,
}
