"""Token ids and text: tokenizer, incremental detokenization, chat template."""
