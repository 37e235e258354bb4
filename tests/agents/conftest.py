from echo_fixtures import _registered, config, folder, make_model, model, sampled, tokenizer

__all__ = ["_registered", "config", "folder", "make_model", "model", "sampled", "tokenizer"]
