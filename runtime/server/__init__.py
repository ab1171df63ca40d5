"""The HTTP server: OpenAI's API over a GenerationService. Needs the extra `serve`; docs/serving.md is its manual."""
