"""A result that runs without dynarank: plain modules, PEFT adapters, ONNX."""
