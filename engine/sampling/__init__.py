"""The parts of `engine.sampler`: reductions over the vocabulary, edits of logits, filters and draws, logprobs."""
