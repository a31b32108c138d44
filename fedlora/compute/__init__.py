"""What makes a pass cheap: examples as rows, a shared prefix, a readout at one position, and what a process keeps."""
