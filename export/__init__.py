"""Student to bundle: ONNX, OpenVINO and Core ML, each checked before it is written."""
