"""
Turn a Lory that has read its prompt into a LLaMA, which other programs can load and serve.

    python experiments/to_llama.py --checkpoint=out/ckpt.pt --start=FILE:prompt.txt --out=expert

The prompt routes once and merges the experts (Sec. 3.1). What remains is a dense model of LLaMA's shape,
so only names change. A dense checkpoint needs no prompt. The folder that is written loads with
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

The LLaMA continues the prompt as sample.py does, up to block_size tokens. From there on a Lory drops its
oldest tokens, and a LLaMA does not. Token ids are those of `prepare.encode` after a first <|endoftext|>, for
texts of up to 100,000 characters. An <|endoftext|> written out in a text is plain text in both
(`split_special_tokens`); a program that reads tokenizer.json alone takes it for the special token.

It needs one more library: pip install transformers (tried with 5.24.0).
"""
import base64
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from lory import UserError, add_flag, load_checkpoint, make_parser, run_script
from prepare import EOT, encode, load_tokenizer
from sample import read_prompt, specialize

try:
    from safetensors import SafetensorError
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    missing = ''
except ImportError as e:
    missing = e.name


def to_llama(model, eot):
    """A dense Lory as a LlamaForCausalLM, in float32. Matrices are x @ W here, (in, out), and nn.Linear's
    (out, in) there. `eot` is the id of <|endoftext|>."""
    c = model.config
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.ffn_hidden,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, max_position_embeddings=c.block_size,
        rope_parameters=dict(rope_type='default', rope_theta=10000.0),  # as in lory.rotation
        rms_norm_eps=torch.finfo(torch.float32).eps,  # torch.nn.RMSNorm's
        tie_word_embeddings=c.tie_embeddings, bos_token_id=eot, eos_token_id=eot))
    state = {'model.embed_tokens.weight': model.embed.weight, 'model.norm.weight': model.norm.weight,
             'lm_head.weight': model.head.weight}  # (V, D), (D,), (V, D)
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv.weight.chunk(3)  # (D, D) each
        weights = {'input_layernorm': block.attn_norm.weight,
                   'post_attention_layernorm': block.ffn_norm.weight,
                   'self_attn.q_proj': q, 'self_attn.k_proj': k, 'self_attn.v_proj': v,
                   'self_attn.o_proj': block.attn.proj.weight,
                   'mlp.gate_proj': block.ffn.gate[0].T, 'mlp.up_proj': block.ffn.up[0].T,  # (H, D)
                   'mlp.down_proj': block.ffn.down[0].T}  # (D, H)
        state |= {f'model.layers.{i}.{name}.weight': weight for name, weight in weights.items()}
    llama.load_state_dict(state)
    llama.generation_config = GenerationConfig(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
    return llama.eval()


def byte_alphabet():
    """One printable character for each byte, GPT-2's. A byte that has none gets the next one from 256 on."""
    hidden = [b for b in range(256) if not chr(b).isprintable() or chr(b) == ' ']
    return [chr(256 + hidden.index(b)) if b in hidden else chr(b) for b in range(256)]


def to_tokenizer(d, block_size):
    """The content of prepare.py's tokenizer.json, a dict, as a PreTrainedTokenizerFast.

    tiktoken takes a piece that is a token as it is (`ignore_merges`). In any other it joins the two
    neighbours whose joint token has the lowest rank, whatever they are. So every way to cut a token into two
    tokens is a merge, in the order of the ranks. Of two ways to make the same token tiktoken takes the left
    one and tokenizers the one listed first; no text is known in which that matters."""
    letters = byte_alphabet()
    tokens = {}  # spelled in letters -> id, in rank order
    for rank, token in enumerate(d['tokens']):
        if token:  # tiktoken's p50k has a gap
            tokens[''.join(letters[b] for b in base64.b64decode(token))] = rank
    merges = [(token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token))
              if token[:cut] in tokens and token[cut:] in tokens]
    vocab = tokens | d['special_tokens']
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)
                                  for name in d['special_tokens']])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(d['pattern']), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f'{EOT} $A', special_tokens=[(EOT, d['special_tokens'][EOT])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, split_special_tokens=True,
        clean_up_tokenization_spaces=False, model_max_length=block_size,
        model_input_names=['input_ids', 'attention_mask'])


def flags():
    parser = make_parser(__doc__)
    add_flag(parser, 'checkpoint', 'out/ckpt.pt', 'the checkpoint file to read')
    add_flag(parser, 'start', '', 'the prompt that merges the experts, or FILE:path to read it from')
    add_flag(parser, 'out', 'expert', 'folder to write, new or empty')
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if missing:
        raise UserError(f'{missing} is not installed: pip install transformers')
    if os.path.isfile(args.out) or os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f'{args.out} exists and is no empty folder: choose another --out.')
    model, ckpt = load_checkpoint(args.checkpoint)
    encoding = load_tokenizer(ckpt['tokenizer'])
    if model.config.n_experts > 1:
        text = read_prompt(args.start)
        if not text:
            raise UserError('the experts are merged by a prompt: give one with --start, or FILE:path.')
        model = specialize(model, torch.tensor([[encoding.eot_token] + encode(encoding, text)]))  # (1, L)
    try:
        to_llama(model, encoding.eot_token).save_pretrained(args.out)
        to_tokenizer(ckpt['tokenizer'], model.config.block_size).save_pretrained(args.out)
    except (OSError, SafetensorError) as e:
        raise UserError(f'cannot write {args.out} ({e}): free some space or choose another --out.') from e
    print(f"{args.out} is written; now try: transformers.pipeline('text-generation', '{args.out}')")


if __name__ == '__main__':
    run_script(main)
