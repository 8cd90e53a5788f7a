"""An OpenAI-compatible server over one loaded model."""
