"""One model over HTTP: the OpenAI-compatible endpoint and the chat page."""
