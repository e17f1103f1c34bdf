/* infer_request.h (hot path): the layouts of one inference request; filled in below. */
#ifndef PENSTOCK_INFER_REQUEST_H
#define PENSTOCK_INFER_REQUEST_H

typedef struct ps_request ps_request;
typedef struct ps_tensor ps_tensor;
typedef struct ps_ports ps_ports;

#endif
