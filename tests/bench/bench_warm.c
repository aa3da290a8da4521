/* Gives the kernel's pool of free pages memory that the host has backed lately: takes BYTES of huge pages, touches
 * them, and frees them. What is measured right afterwards finds memory equally quick, whoever measures.
 *
 *   bench_warm BYTES */
#include <stdio.h>
#include <stdlib.h>

#include "tests/bench/bench_memory.h"

int main(int argc, char **argv)
{
    uint64_t bytes = argc == 2 ? strtoull(argv[1], NULL, 10) : 0;
    if (bytes == 0) {
        fprintf(stderr, "usage: bench_warm BYTES\n");
        return 2;
    }
    int fd;
    if (!bench_memory_make(bytes, &fd)) {
        perror("bench_warm");
        return 1;
    }
    return 0;
}
