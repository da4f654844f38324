"""The noisy channel: which text is likeliest behind a signal, ``argmax p(text) p(signal | text)``."""
