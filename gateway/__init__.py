"""One OpenAI endpoint over Ollama and vLLM. The design story is in README.md beside this."""
