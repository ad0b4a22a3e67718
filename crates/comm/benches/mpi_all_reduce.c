/* MPI_Allreduce in place, f32, sum: what the host backend is measured against.
 * Arguments: size:iterations ...; prints "size_bytes time_us wrong" for each, from rank 0. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  int rank, size;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (int arg = 1; arg < argc; arg++) {
    long bytes = 0, iterations = 0, wrong = 0;
    if (sscanf(argv[arg], "%ld:%ld", &bytes, &iterations) != 2) MPI_Abort(MPI_COMM_WORLD, 64);
    long count = bytes / (long)sizeof(float);
    float *buffer = NULL;
    if (posix_memalign((void **)&buffer, 4096, (size_t)bytes + 4096)) MPI_Abort(MPI_COMM_WORLD, 70);
    for (long i = 0; i < count; i++) buffer[i] = (float)(rank + i % 13);
    MPI_Allreduce(MPI_IN_PLACE, buffer, (int)count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    for (long i = 0; i < count; i++)
      wrong += buffer[i] != (float)(size * (size - 1) / 2 + size * (i % 13));
    for (long i = 0; i < count; i++) buffer[i] = 0.0f;
    for (long i = 0; i < iterations / 10 + 1; i++)
      MPI_Allreduce(MPI_IN_PLACE, buffer, (int)count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (long i = 0; i < iterations; i++)
      MPI_Allreduce(MPI_IN_PLACE, buffer, (int)count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    double us = (MPI_Wtime() - start) / (double)iterations * 1e6;
    if (rank == 0) {
      printf("%ld %.4f %ld\n", bytes, us, wrong);
      fflush(stdout);
    }
    free(buffer);
  }
  MPI_Finalize();
  return 0;
}
