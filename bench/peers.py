"""What the benches compare with."""
from train_gpt2 import GPT


def transformers_twin(model: GPT):
    """Build transformers' GPT2LMHeadModel with the weights of `model`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = model.config
    twin = GPT2LMHeadModel(GPT2Config(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd,
                                      vocab_size=shape.vocab_size, n_positions=shape.block_size))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored as (in, out) there
    twin.load_state_dict({name: weight.t() if name.endswith(conv1d) else weight
                          for name, weight in model.state_dict().items()})
    return twin.eval()
