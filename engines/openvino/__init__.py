"""OpenVINO: bfloat16 on processors that multiply in it, and Intel's GPUs."""
