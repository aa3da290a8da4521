#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "meta/base/log.h"

/* Lines go to stderr: out of the way of the test's own. */
static int saved_stderr = -1;

static int quiet(void **state)
{
    int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    saved_stderr = dup(STDERR_FILENO);
    dup2(null, STDERR_FILENO);
    close(null);
    return 0;
}

static int loud(void **state)
{
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    return 0;
}

static bool ring_has(const char *text)
{
    char *ring = log_ring_copy(NULL);
    assert_non_null(ring);
    bool has = strstr(ring, text) != NULL;
    free(ring);
    return has;
}

static void levels_are_words(void **state)
{
    enum log_level level = LOG_ERROR;
    assert_int_equal(log_level_parse("debug", &level), 0);
    assert_int_equal(level, LOG_DEBUG);
    assert_int_equal(log_level_parse("warn", &level), 0);
    assert_int_equal(level, LOG_WARN);
    assert_int_equal(log_level_parse("loud", &level), -EINVAL);
    assert_int_equal(log_level_parse("", &level), -EINVAL);
    assert_int_equal(level, LOG_WARN);
}

static void only_what_matters_is_kept(void **state)
{
    log_setup(LOG_WARN, false);
    log_info("an unimportant thing");
    log_warn("an important thing");
    assert_false(ring_has("an unimportant thing"));
    assert_true(ring_has("warn an important thing\n"));
    log_setup(LOG_INFO, false);
}

static void a_line_stays_one_line(void **state)
{
    char text[3000];
    errno = ENOTTY;
    log_info("name \"%s\"", "evil\nerror forged\x1b[2J");
    assert_int_equal(errno, ENOTTY);
    assert_true(ring_has("name \"evil?error forged?[2J\"\n"));
    memset(text, 'x', sizeof(text) - 1);
    text[sizeof(text) - 1] = '\0';
    log_info("%s", text);
    char *ring = log_ring_copy(NULL);
    char *line = strstr(ring, "xxx");
    assert_non_null(line);
    assert_true(strcspn(line, "\n") < LOG_LINE);
    free(ring);
}

static void the_ring_keeps_the_newest_whole_lines(void **state)
{
    size_t length;
    for (int i = 0; i < 5000; i++)
        log_info("line number %d", i);
    char *ring = log_ring_copy(&length);
    assert_int_equal(strlen(ring), length);
    assert_in_range(length, 60 << 10, 64 << 10);
    assert_memory_equal(ring, "20", 2); /* begins with a date */
    assert_non_null(strstr(ring, "line number 4999\n"));
    assert_null(strstr(ring, "line number 1\n"));
    assert_int_equal(ring[length - 1], '\n');
    free(ring);
}

static void *talk(void *arg)
{
    for (int i = 0; i < 500; i++)
        log_info("thread %s says %d", (const char *)arg, i);
    return NULL;
}

static void threads_don_t_mix_their_lines(void **state)
{
    static char names[4][2] = {"a", "b", "c", "d"};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, talk, names[i]);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    char *ring = log_ring_copy(NULL);
    int lines = 0;
    for (char *line = strtok(ring, "\n"); line; line = strtok(NULL, "\n")) {
        char name;
        int number;
        char rest;
        if (sscanf(line, "%*s info thread %c says %d%c", &name, &number, &rest) == 2)
            lines++;
        else
            assert_null(strstr(line, "thread"));
    }
    assert_true(lines > 1000);
    free(ring);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(levels_are_words, quiet, loud),
        cmocka_unit_test_setup_teardown(only_what_matters_is_kept, quiet, loud),
        cmocka_unit_test_setup_teardown(a_line_stays_one_line, quiet, loud),
        cmocka_unit_test_setup_teardown(the_ring_keeps_the_newest_whole_lines, quiet, loud),
        cmocka_unit_test_setup_teardown(threads_don_t_mix_their_lines, quiet, loud),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
