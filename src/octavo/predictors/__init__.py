"""Models that are counted, not trained: scored, sampled and served like any other."""
