"""What `engines bench` measures: `loading` and `control_plane`, each one run on this machine with baselines beside our figures."""
