"""Trains sparvar's bundled model: pictures, BSQ-VAE, text encoder and transformer, export, evaluation."""
