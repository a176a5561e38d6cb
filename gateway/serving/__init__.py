"""The engines and the models in service: admission, catalogue, discovery, loading."""
