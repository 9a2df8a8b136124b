"""From encoded media to arrays: time windows, probing, decoding of video, audio, pictures and captions."""
