"""Fine-tuning: a backbone, an adapter and a head learn one target of a store."""
