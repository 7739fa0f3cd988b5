"""The three encoders, the module that joins them, and the front end from decoded clips to their inputs."""
