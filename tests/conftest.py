"""What holds for all tests."""

import os

# Nothing is asked of a model hub. Read once, when huggingface_hub is imported, so it is set before anything else.
os.environ["HF_HUB_OFFLINE"] = "1"
