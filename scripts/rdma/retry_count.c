/* Loaded before libibverbs by the programs of the tests: lowers a retry_cnt of 7 to 6.
 *
 * Mooncake asks for 7, the most that there is. Hardware then tries seven times. rdma_rxe takes 7 for
 * "without end", so a read from a process that has ended would never fail.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <infiniband/verbs.h>

#define MOST_RETRIES 6

typedef int (*modify_qp)(struct ibv_qp *, struct ibv_qp_attr *, int);

int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
    static modify_qp real;

    if (!real) {
        void *library = dlopen("libibverbs.so.1", RTLD_NOW);
        real = (modify_qp)dlvsym(library, "ibv_modify_qp", "IBVERBS_1.1");
    }
    if ((mask & IBV_QP_RETRY_CNT) && attr->retry_cnt > MOST_RETRIES)
        attr->retry_cnt = MOST_RETRIES;
    return real(qp, attr, mask);
}
