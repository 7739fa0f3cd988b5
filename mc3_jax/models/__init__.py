"""The three encoders, the module that joins them, and the front end that turns decoded clips into their inputs."""
