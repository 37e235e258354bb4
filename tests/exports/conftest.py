from echo_fixtures import _registered, make_model, model, sampled, tokenizer

__all__ = ["_registered", "make_model", "model", "sampled", "tokenizer"]
