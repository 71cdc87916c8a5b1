"""The main job: a source's images, embedded into a store."""
