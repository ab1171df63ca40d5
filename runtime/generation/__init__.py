"""The inference loop: requests, sampling, stopping, batches, chat."""
