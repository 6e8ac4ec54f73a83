/* Calls kernels of the library argv[1] as tests/elsewhere.py asks for it; all that they are given ends where reading or
   writing on is a fault.

   Asked for, as numbers of 64 bits unless said: length and characters of a name; buffers, for each its size and bytes;
   places of addresses, for each buffer and byte and those that it points to; integers and addresses in their order, for
   each a buffer, or -1, and a number; floats, for each 4 bytes. Answered: the result, and all buffers' bytes. */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { BUFFERS = 64, INTEGERS = 24, FLOATS = 4, PAGE = 1 << 16 };

/* Integers and floats are counted apart where they are handed over, on x86-64 as on aarch64, so that their order among
   each other is none. */
typedef int64_t (*kernel)(
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float,
    float, float
);

typedef struct {
    char *start, *room;
    int64_t size, whole;
} buffer;

static void get(void *to, int64_t size) {
    if (size && fread(to, size, 1, stdin) != 1) exit(feof(stdin) ? 0 : 1);
}

static int64_t number(int64_t most) {
    int64_t x;
    get(&x, sizeof x);
    if (x > most) exit(2);
    return x;
}

static buffer get_buffer(void) {
    buffer b = {.size = number(INT64_MAX)};
    b.whole = (b.size + PAGE - 1) / PAGE * PAGE + PAGE;
    b.room = mmap(0, b.whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b.room == MAP_FAILED || mprotect(b.room + b.whole - PAGE, PAGE, PROT_NONE)) exit(3);
    b.start = b.room + b.whole - PAGE - b.size;
    get(b.start, b.size);
    return b;
}

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : 0;
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 4;
    for (;;) {
        char name[64] = {};
        buffer of[BUFFERS];
        int64_t x[INTEGERS] = {};
        float f[FLOATS] = {};
        get(name, number(sizeof name - 1));
        kernel call = (kernel)dlsym(library, name);
        if (!call) return fprintf(stderr, "%s\n", dlerror()), 5;
        int64_t buffers = number(BUFFERS);
        for (int64_t i = 0; i < buffers; i++) of[i] = get_buffer();
        for (int64_t n = number(INT64_MAX); n > 0; n--) {
            char *at = of[number(buffers - 1)].start;
            at += number(INT64_MAX);
            char *to = of[number(buffers - 1)].start;
            *(char **)at = to + number(INT64_MAX);
        }
        int64_t integers = number(INTEGERS);
        for (int64_t i = 0; i < integers; i++) {
            int64_t which = number(buffers - 1), value = number(INT64_MAX);
            x[i] = which < 0 ? value : (int64_t)(of[which].start + value);
        }
        get(f, number(FLOATS) * sizeof(float));
        int64_t result = call(
            x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15], x[16],
            x[17], x[18], x[19], x[20], x[21], x[22], x[23], f[0], f[1], f[2], f[3]
        );
        fwrite(&result, sizeof result, 1, stdout);
        for (int64_t i = 0; i < buffers; i++) {
            fwrite(of[i].start, 1, of[i].size, stdout);
            munmap(of[i].room, of[i].whole);
        }
        fflush(stdout);
    }
}
