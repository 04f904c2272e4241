"""A merged model in the files of other programs: GGUF for llama.cpp, a Modelfile for Ollama."""
