"""Images from disk to the network: sources and their index, class-aware sampling, decoding and augmentation."""
