from serving import client, tokenizer

__all__ = ["client", "tokenizer"]
